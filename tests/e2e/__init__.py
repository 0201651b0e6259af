"""The fairseq commands themselves, with the plugin."""
