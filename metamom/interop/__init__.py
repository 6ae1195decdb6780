"""metamom beside other libraries. Importing this imports none of them."""
