"""Home of fairseq tasks. There are none: checks and step hooks act with the stock tasks (see ``stock``)."""
