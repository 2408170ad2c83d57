
// Filter of the items that changed, and folded tables on paper. The page is complete without it.
for (const box of document.querySelectorAll(".explorer")) {
  const selects = [...box.querySelectorAll("select")], count = box.querySelector("output");
  const apply = () => {
    let shown = 0;
    for (const item of box.querySelectorAll(".item")) {
      item.hidden = selects.some((select) => select.value && item.dataset[select.name] !== select.value);
      shown += !item.hidden;
    }
    count.textContent = shown;
  };
  selects.forEach((select) => select.addEventListener("change", apply));
  box.querySelector(".controls").hidden = false;
  apply();
}
addEventListener("beforeprint", () => {
  for (const table of document.querySelectorAll("details.table")) table.open = true;
});
