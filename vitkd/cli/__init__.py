"""The command line: from what is typed to a checked job, and from an error to one line."""
