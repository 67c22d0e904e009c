"""The command `catp sweep`: compare any list of methods side by side, on one model or on all shipped ones."""
