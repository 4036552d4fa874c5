"""Reading text: files, a module for each format of them, and what is odd in them."""
