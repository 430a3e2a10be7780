"""From a source of images to the manifest: what there is, what each file is, what it must be."""
