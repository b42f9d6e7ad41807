"""The server as an operator sees it: started, watched, loaded, cut off and stopped."""
