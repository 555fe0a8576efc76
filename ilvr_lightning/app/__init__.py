"""The page of app.py, on which one steers samples in a browser. gradio is imported in page.py and server.py alone."""
