// What Gradio's controls lack. Sliders: keys let them go, too, and the field beside one is never left blank or out of bounds.
() => {
    const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End"];

    let resting;

    document.addEventListener("keyup", ({ key, target }) => {
        if (!target.matches("input[type=range]") || !KEYS.includes(key)) return;
        clearTimeout(resting);  // a slider that is tapped along is let go at its last tap
        const letGo = () => target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));  // Gradio's sign
        resting = setTimeout(letGo, 400);
    });

    document.addEventListener("blur", (event) => {
        const field = event.target;
        if (!(field instanceof HTMLInputElement && field.type === "number")) return;
        const reset = field.parentElement.querySelector("[data-testid=reset-button]");
        if (field.value === "" && reset) {
            event.stopPropagation();  // Gradio would make it 0
            reset.click();
        } else if (field.validity.rangeUnderflow || field.validity.rangeOverflow) {
            field.value = field.validity.rangeUnderflow ? field.min : field.max;
            field.dispatchEvent(new Event("input", { bubbles: true }));
        }
    }, true);

    // Under one name the radios of a question are one stop of Tab, and arrows move among them: Gradio names each anew.
    const named = () => {
        for (const radio of document.querySelectorAll("[id^=input-] input[type=radio]")) {
            const name = radio.closest("[id^=input-]").id + (radio.closest("[role=tabpanel]")?.id ?? "");
            if (radio.name !== name) radio.name = name;
        }
        for (const picture of document.querySelectorAll(".image-frame img:not([alt]), .image-frame img[alt='']"))
            picture.alt = picture.closest(".block").querySelector("[data-testid=block-label]")?.innerText.trim() || "Picture";
    };
    const changes = { childList: true, subtree: true, attributes: true, attributeFilter: ["name", "alt"] };
    new MutationObserver(named).observe(document.body, changes);

    // Of several files Gradio takes the first without a word, and of a folder it says that the connection failed.
    document.addEventListener("drop", (event) => {
        const files = [...event.dataTransfer.items].filter(({ kind }) => kind === "file");
        if (!files[1] && !files[0]?.webkitGetAsEntry()?.isDirectory) return;
        event.preventDefault();
        event.stopPropagation();
        event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
        alert("Expected one file, and no folder.");
    }, true);
}
