"""Search: candidates race over the learning part, and the winner's promise is tested on the rest."""
