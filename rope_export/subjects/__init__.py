"""What can be exported: an attention block, or any module."""
