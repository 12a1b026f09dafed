"""Random views of training images, a whole batch at once on its device."""
