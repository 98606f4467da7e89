"""What scaling.py is made of: ranks, what they measure, and the model of many of them."""
