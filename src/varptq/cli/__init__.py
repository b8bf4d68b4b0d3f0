"""The command line: one thin file per verb, which reads arguments, makes one or two calls and
prints."""
