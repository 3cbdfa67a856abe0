"""What the commands return: plain data, no torch.

Every report has `to_json`: the object that ``--json`` prints.  Its keys are the field names,
after ``schema``, ``command`` and ``ok``; they are stable within one schema number.
Shares and errors are fractions of 1, sizes are bytes, times are seconds.
"""
