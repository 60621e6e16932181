// Before anything is drawn: the theme that was chosen last, so that a reload does not flash.
(() => {
  try {
    const theme = localStorage.getItem("redrafter.theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    // A browser that keeps nothing follows the system.
  }
})();
