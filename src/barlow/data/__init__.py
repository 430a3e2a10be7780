"""From a source of images to the manifest: the files that there are, their facts, and what is expected of them."""
