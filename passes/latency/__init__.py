"""When transfers are issued: moving loads ahead of their operators and stores behind, so that compute hides them."""
