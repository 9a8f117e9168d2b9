"""Statistics: intervals, moments in parts, what a few seeds can say, and how it is drawn."""
