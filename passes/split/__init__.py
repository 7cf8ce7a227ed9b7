"""Cutting a region of a graph along an axis of its tokens, so that one part computes while another communicates."""
