"""Methods compared on one set of questions: results with intervals, tables, plots, and the sweep."""
