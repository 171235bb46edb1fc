// A browser starts no worker from a page that was opened from disk. There the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.frame = frame;
      addEventListener("message", event => {
        if (event.source !== frame.contentWindow) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      const page = frame.contentDocument;
      page.open();
      page.write(
        "<script>postMessage = message => parent.postMessage(message, '*');" +
        "importScripts = (...all) => all.reduce((before, one) => before.then(() => new Promise(done => {" +
        "const script = document.createElement('script'); script.src = one; script.onload = done;" +
        "document.body.append(script); })), Promise.resolve());</scr" + "ipt>" +
        '<body><script src="' + address + '"></scr' + "ipt>",
      );
      page.close();
    }
    postMessage(message) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: message, source: window }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
