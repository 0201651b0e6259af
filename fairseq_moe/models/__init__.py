"""fairseq models; every module here is imported by fairseq's --user-dir."""
