"""The command line: a verb parses, calls the library and prints."""
