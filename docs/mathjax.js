// Formulas are elements of class arithmatex. MathJax itself comes from a package of the docs extra (scripts/docs_hooks.py).
window.MathJax = {
  tex: { displayMath: [["\\[", "\\]"]], inlineMath: [["\\(", "\\)"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
};
