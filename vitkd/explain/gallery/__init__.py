"""What is found, for a reader: one HTML page, the report's figures, arrays and numbers."""
