"""`weighting=`: how much the class loss, the transfer loss and each image count."""
