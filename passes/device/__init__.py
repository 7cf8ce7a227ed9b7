"""Where and when everything happens on a device that allocates: an order, one arena, and what is allocated apart."""
