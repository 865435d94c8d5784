"""Training every width at once: the steps, the `Trainer`, optimizer, averaged weights, augmentation and runs."""
