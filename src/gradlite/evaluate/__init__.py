"""What a model can do, whatever trained it: held-out loss and answers to questions."""
