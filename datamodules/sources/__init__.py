"""Sources of images, one file per family of data sets."""
