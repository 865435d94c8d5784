// Runs a HydraViT at several widths in the browser, with ONNX Runtime Web.
//
// The file of a width has what its weights add to those of the next narrower one. `grow` loads the next width and puts
// its weights together. Images are resized as Pillow does it, bit for bit, so the logits are those of Python.
//
//   const model = await HydraViT.open();
//   while (await model.grow());
//   const pixels = model.preprocess(await createImageBitmap(file));
//   const {logits, ms} = await model.run(pixels, 3);

import * as ort from "./onnxruntime/ort.wasm.min.mjs";

const HERE = new URL(".", import.meta.url);
ort.env.wasm.wasmPaths = new URL("onnxruntime/", HERE).href;
ort.env.wasm.proxy = true; // the page stays responsive, because a worker computes
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;

export class HydraViT {
  #weights = null;
  #sessions = new Map();

  constructor(manifest) {
    Object.assign(this, manifest);
  }

  static async open() {
    return new HydraViT(await (await get("model.json")).json());
  }

  get heads() {
    return [...this.#sessions.keys()];
  }

  get threads() {
    return ort.env.wasm.numThreads;
  }

  // Load the next wider width, and return it, or null if there is none. `onProgress` is told its share from 0 to 1.
  async grow(onProgress = () => {}) {
    const width = this.widths[this.#sessions.size];
    if (!width) return null;
    const [graph, added] = await Promise.all([
      get(width.graph).then((response) => response.arrayBuffer()),
      get(width.weights).then((response) => read(response, width.bytes, onProgress)),
    ]);
    this.#weights = assemble(width.layout, this.#weights, new Float32Array(added));
    const externalData = [{path: "weights", data: new Uint8Array(this.#weights.buffer)}];
    const session = await ort.InferenceSession.create(new Uint8Array(graph), {externalData});
    this.#sessions.set(width.heads, session);
    if (this.#sessions.size === this.widths.length) this.#weights = null; // each session has its own copy
    return width;
  }

  // Make the input of a model, (channels x height x width) numbers, of a bitmap or a canvas.
  preprocess(bitmap) {
    const {channels, size, filter, crop, scale, mean, deviation} = this.preprocessing;
    let image = readPixels(bitmap, channels);
    if (size) {
      const [height, width] = target(image, size);
      image = resizeRows(image, width, filter);
      image = transpose(resizeRows(transpose(image), height, filter));
    }
    if (crop) image = cropCentre(image, crop.height, crop.width);
    const area = image.height * image.width, pixels = new Float32Array(channels * area);
    for (let channel = 0; channel < channels; channel++) {
      for (let place = 0; place < area; place++) {
        const value = Math.fround(image.data[place * channels + channel] * scale);
        pixels[channel * area + place] = (value - mean[channel]) / deviation[channel];
      }
    }
    return pixels;
  }

  // Run a width that is loaded on the pixels of one image. Returns its logits and the milliseconds it took.
  async run(pixels, heads) {
    const input = new ort.Tensor("float32", pixels.slice(), [1, ...this.preprocessing.shape]);
    const begin = performance.now();
    const {logits} = await this.#sessions.get(heads).run({pixel_values: input});
    return {logits: logits.data, ms: performance.now() - begin};
  }
}

async function get(name) {
  const response = await fetch(new URL(name, HERE));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

// Read the body of a response, whose size is known, into one buffer.
async function read(response, size, onProgress) {
  const bytes = new Uint8Array(size), reader = response.body.getReader();
  let place = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    bytes.set(part.value, place);
    place += part.value.length;
    onProgress(place / size);
  }
  if (place !== size) throw new Error(`a file of weights has ${place} bytes, not ${size}`);
  return bytes.buffer;
}

// Put the weights of a width together from those of the narrower one and from what it adds.
function assemble(layout, narrower, added) {
  const weights = new Float32Array(layout.reduce((sum, [rows, columns]) => sum + rows * columns, 0));
  let to = 0, from = 0;
  for (const [rows, columns, keptRows, keptColumns, keptAt] of layout) {
    for (let row = 0; row < keptRows; row++) {
      const start = keptAt + row * keptColumns, fresh = columns - keptColumns;
      weights.set(narrower.subarray(start, start + keptColumns), to);
      weights.set(added.subarray(from, from + fresh), to + keptColumns);
      to += columns;
      from += fresh;
    }
    const rest = (rows - keptRows) * columns;
    weights.set(added.subarray(from, from + rest), to);
    to += rest;
    from += rest;
  }
  return weights;
}

// The bytes of an image, row by row, as RGB or as the gray of ITU-R 601. Transparent pixels become white.
function readPixels(bitmap, channels) {
  const {width, height} = bitmap, context = new OffscreenCanvas(width, height).getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * channels);
  for (let place = 0; place < width * height; place++) {
    const red = rgba[4 * place], green = rgba[4 * place + 1], blue = rgba[4 * place + 2];
    if (channels === 1) data[place] = (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16;
    else data.set([red, green, blue], 3 * place);
  }
  return {data, width, height, channels};
}

// Height and width to resize to. `shortest_edge` keeps the proportions.
function target({height, width}, size) {
  if (!size.shortest_edge) return [size.height, size.width];
  const long = Math.trunc((size.shortest_edge * Math.max(height, width)) / Math.min(height, width));
  return height <= width ? [size.shortest_edge, long] : [long, size.shortest_edge];
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

const FILTERS = { // half width, and value at a distance
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const distance = Math.abs(x);
    if (distance < 1) return (1.5 * distance - 2.5) * distance * distance + 1;
    return distance < 2 ? ((-0.5 * distance + 2.5) * distance - 4) * distance + 2 : 0;
  }],
  lanczos: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

// Resize each row to a new width. As in Pillow, weights have 22 bits after the point, and sums are rounded to bytes.
function resizeRows(image, width, filter) {
  if (width === image.width) return image;
  const {height, channels} = image, data = new Uint8Array(height * width * channels);
  const [half, weigh] = FILTERS[filter], step = image.width / width, stretch = Math.max(1, step);
  for (let column = 0; column < width; column++) {
    const centre = (column + 0.5) * step;
    const first = Math.max(0, Math.trunc(centre - half * stretch + 0.5));
    const last = Math.min(image.width, Math.trunc(centre + half * stretch + 0.5));
    const weights = Array.from({length: last - first}, (_, index) => weigh((first + index - centre + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const fixed = weights.map((weight) => Math.trunc((weight / sum) * 2 ** 22 + (weight < 0 ? -0.5 : 0.5)));
    for (let row = 0; row < height; row++) {
      for (let channel = 0; channel < channels; channel++) {
        let value = 2 ** 21;
        for (let index = 0; index < fixed.length; index++) {
          value += fixed[index] * image.data[(row * image.width + first + index) * channels + channel];
        }
        data[(row * width + column) * channels + channel] = Math.min(255, Math.max(0, Math.floor(value / 2 ** 22)));
      }
    }
  }
  return {data, width, height, channels};
}

function transpose({data, width, height, channels}) {
  const turned = new Uint8Array(data.length);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      for (let channel = 0; channel < channels; channel++) {
        turned[(column * height + row) * channels + channel] = data[(row * width + column) * channels + channel];
      }
    }
  }
  return {data: turned, width: height, height: width, channels};
}

// Cut out the centre. Where the image is smaller, the rest is black.
function cropCentre(image, height, width) {
  const {channels} = image, data = new Uint8Array(height * width * channels);
  const top = Math.floor((image.height - height) / 2), left = Math.floor((image.width - width) / 2);
  for (let row = Math.max(0, -top); row < Math.min(height, image.height - top); row++) {
    for (let column = Math.max(0, -left); column < Math.min(width, image.width - left); column++) {
      const from = ((row + top) * image.width + column + left) * channels;
      data.set(image.data.subarray(from, from + channels), (row * width + column) * channels);
    }
  }
  return {data, width, height, channels};
}
