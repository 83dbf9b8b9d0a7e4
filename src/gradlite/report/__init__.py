"""One self-contained HTML page of a training run, or of a set of records: sentences, tables and figures made from files."""
