"""What the numbers of the pages were measured with; README.md lists the scripts."""
