"""What report.py is made of: results read, questions answered, tables, plots."""
