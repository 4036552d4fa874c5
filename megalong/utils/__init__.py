"""Small modules that several rooms need."""
