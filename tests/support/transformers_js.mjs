// Prints what transformers.js makes of an image: logits and labels for each dtype of an exported folder.
// node transformers_js.mjs FOLDER IMAGE DTYPE...
import {pipeline, env, RawImage} from "@huggingface/transformers";
import {basename, dirname} from "node:path";

const [folder, path, ...dtypes] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const image = await RawImage.read(path), answers = {};
for (const dtype of dtypes) {
  const classify = await pipeline("image-classification", basename(folder), {dtype, device: "cpu"});
  const {pixel_values} = await classify.processor(image);
  const {logits} = await classify.model({pixel_values});
  answers[dtype] = {logits: Array.from(logits.data), labels: await classify(image, {top_k: 3})};
}
console.log(JSON.stringify(answers));
