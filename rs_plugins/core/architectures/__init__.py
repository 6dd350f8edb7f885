"""Networks by name, their normalisation and their last layer. Nothing is downloaded."""
