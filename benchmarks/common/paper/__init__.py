"""The experiments of the paper: its tables, the rows, what measures them, what they take."""
