"""Statistics: intervals, streaming moments, summaries of a few seeds, and the style of figures."""
