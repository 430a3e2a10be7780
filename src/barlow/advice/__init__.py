"""What `barlow recommend` and `barlow tune` go by: a look at the images, a measured step, and the recipe."""
