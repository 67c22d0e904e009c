"""`catp sweep`: any list of methods, on one model or on all shipped ones, side by side."""
