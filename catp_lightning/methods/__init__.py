"""Methods of token pruning: the signals they read, scorers, selectors, and how many tokens a budget keeps."""
