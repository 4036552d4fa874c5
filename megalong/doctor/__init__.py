"""`python -m megalong.doctor`: what this machine has for training, and how to get the rest."""
