"""What train_step.py is made of: systems, settings, figures, and the layers alone."""
