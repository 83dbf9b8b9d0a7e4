"""The command line: one small file a verb, and every flag generated from the configuration's own keys."""
