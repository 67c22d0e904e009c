"""Outputs of a calibration: evidence in the policy, page, figures, log."""
