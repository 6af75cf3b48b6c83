"""Finished runs as something to read: a web page, Markdown or JSON, of one run or of several side by side."""
