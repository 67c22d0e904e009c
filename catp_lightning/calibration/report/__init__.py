"""What a calibration tells: evidence in the policy, page, figures, log."""
