"""Other programs that run models: a package here may import the one that it is for, nothing else may."""
