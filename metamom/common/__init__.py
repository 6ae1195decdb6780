"""What every room needs: checks of arguments, numbers as text, files, records."""
