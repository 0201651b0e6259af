"""How is the load spread over the experts? The record on disk, its watch, summary, table and plot."""
