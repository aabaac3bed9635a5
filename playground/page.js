// What Gradio's sliders lack: keys let them go, too, and the field beside one is never left blank or out of bounds.
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
}
