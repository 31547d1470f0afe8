/** What the page says, in two languages. A key that is missing says itself. */
const en = {
  live: "Live", events: "Events", people: "People", system: "System", login: "Log in", logout: "Log out",
  key: "Facelane key", keyHint: "Leave it empty where the server wants none.", language: "中文", theme: "Theme",
  noCameras: "No camera is sending, or none that this key may look at.", connecting: "connecting…", lost: "The connection is lost; trying again.",
  unknown: "unknown", ambiguous: "ambiguous", rejected: "not clear", notEvaluated: "face", spoof: "spoof?", liveFace: "live",
  trust: "trust", codec: "Neither this browser nor the console can decode this camera's video.", asJpeg: "Shown as pictures: this browser has no decoder for {0}.", enlarge: "full screen", camerasOf: "{0} of {1} cameras are shown.", cameraTime: "camera:", forSeconds: "seen for {0} s", onlyOpen: "Not acknowledged only", skip: "Skip to content",
  all: "All kinds", source: "Camera", filter: "Filter", more: "Older events", none: "Nothing yet.", acknowledge: "Acknowledge", acknowledged: "acknowledged",
  notHim: "This is not {0}", isHim: "This is …", whoIsIt: "Who is it? (id)", save: "Save", cancel: "Cancel", undo: "Undo", corrected: "Corrected: not {0}.", correctedIs: "Corrected: {0}.",
  looks: "looks: {0}", similarity: "similarity", pictureOf: "Picture of {0}", nobody: "somebody unknown", noFace: "no face", old: "No picture since {0}.",
  search: "Search", enrol: "Enrol", id: "Id", name: "Name", picture: "Picture", webcam: "Use the webcam", take: "Take picture", chosen: "The picture that is sent", noWebcam: "No camera: the browser has none, or may not use it.", mustLive: "The person has to be there (liveness)", working: "A moment…", gallery: "Gallery", nobodyFound: "Nobody.", export: "Export", exportHint: "All that is kept of this person and this key may see, as a ZIP", enrolled: "Enrolled: quality {0}.",
  faces: "Faces: {0}", quality: "quality", delete: "Delete", deleteAll: "Delete {0} and all that is kept?", receipt: "Receipt of the erasure", close: "Close", deleted: "Templates deleted: {0}.", copy: "Save receipt",
  health: "Health", pools: "Pools", worker: "Worker", state: "State", device: "Device", memory: "Memory", budget: "{0} of {1} MiB", restarts: "Restarts", loss: "Last loss", cameras: "Cameras", rate: "Results a second", age: "Age (p95)", drops: "Dropped", tracks: "Tracks", queued: "Queued", models: "Models", load: "Load", loadHint: "100 % is what fits in time", encoding: "Encoding", watchers: "Watched by", failed: "Failed", shards: "Shards", shard: "Shard", draining: "The server takes no new cameras: it is being shut down.", amiss: "Amiss",
  NO_FACE: "No face was found. Use an upright picture that shows one face from the front.", MULTIPLE_FACES: "The picture shows several faces. Crop it to the one that is meant.",
  OOD_REJECTED: "The face is not clear enough. Take a sharper, brighter picture from the front.", SPOOF_SUSPECTED: "The picture seems to show a print or a screen.",
  NO_CONTEXT: "Too little is shown around the face.", LIVENESS_UNDECIDED: "It is not clear that the person is there. Take another picture.",
  FACE_OF_ANOTHER: "The face matches somebody else who is enrolled. If that is wrong, say so first: “This is not …”.", UNAUTHENTICATED: "The server does not know this key.", PERMISSION_DENIED: "This key may not do that.",
  ended: "The session has ended. Log in again.", nobodyCalled: "Nobody has the id {0}.", enrolNew: "Enrol {0} as somebody new", addFace: "Add a picture", deleteFace: "Delete the face of {0} of {1}?", saidNot: "“This is not …”", saidIs: "“This is …”", peopleOf: "The first {0} are shown. Search for the others.", morePeople: "Show more",
  NO_CONSOLE: "The console does not answer; trying again helps once it runs.", UNREACHABLE: "The server cannot be reached.", DEADLINE_EXCEEDED: "The server did not answer in time.", POOL_UNAVAILABLE: "The models that this needs are not running now.", GALLERY_UNAVAILABLE: "The gallery cannot be used now.", DRAINING: "The server is being shut down.", QUOTA_EXCEEDED: "This key has asked for too much. Wait a minute.", GALLERY_FULL: "The gallery is full.", CAPACITY: "The server has no room for more now.", FULL: "Too many people are logged in.",
  PICTURE_TOO_LARGE: "The picture is too large.", PICTURE_TOO_SMALL: "The picture is too small.", PICTURE_EMPTY: "The picture is empty.", PICTURE_TOO_COSTLY: "The picture takes too long to read. Save it as a plain JPEG.", ENCODING_UNSUPPORTED: "Pictures of this kind are not read. Use JPEG, PNG or WebP.", ENCODING_MISMATCH: "Pictures of this kind are not read. Use JPEG, PNG or WebP.", SUBJECT_NOT_FOUND: "There is no such person any more.", TEMPLATE_NOT_FOUND: "It is not there any more.", EVENT_NOT_FOUND: "The event is not kept any more.", CSRF: "The page is of another session. Load it again.", NO_SESSION: "Log in first.",
  TOO_MANY_TRIES: "Too many tries. Wait a minute.", PICTURE_CORRUPT: "The picture cannot be read.", PICTURE_NOT_FOUND: "The picture is not kept any more.", LOW_OOD_SCORE: "A clearer picture would do better.", LOW_QUALITY: "There is a better picture of this person already.",
};
export type Word = keyof typeof en;
const zh: Record<Word, string> = {
  live: "实时画面", events: "事件", people: "人员", system: "系统", login: "登录", logout: "退出",
  key: "Facelane 密钥", keyHint: "服务器不需要密钥时可留空。", language: "English", theme: "主题",
  noCameras: "没有摄像机在发送画面，或该密钥无权查看。", connecting: "正在连接…", lost: "连接已断开，正在重试。",
  unknown: "陌生人", ambiguous: "不确定", rejected: "不清晰", notEvaluated: "人脸", spoof: "疑似伪造", liveFace: "活体",
  trust: "可信度", codec: "此浏览器和控制台均无法解码该摄像机的视频。", asJpeg: "以图片方式显示：此浏览器没有 {0} 解码器。", enlarge: "全屏", camerasOf: "显示 {0} / {1} 个摄像机。", cameraTime: "摄像机时间：", forSeconds: "出现 {0} 秒", onlyOpen: "仅未确认", skip: "跳到内容",
  all: "所有类型", source: "摄像机", filter: "筛选", more: "更早的事件", none: "暂无内容。", acknowledge: "确认", acknowledged: "已确认",
  notHim: "不是 {0}", isHim: "这是 …", whoIsIt: "是谁？（编号）", save: "保存", cancel: "取消", undo: "撤销", corrected: "已更正：不是 {0}。", correctedIs: "已更正：{0}。",
  looks: "识别 {0} 次", similarity: "相似度", pictureOf: "{0} 的图片", nobody: "陌生人", noFace: "没有人脸", old: "自 {0} 起没有画面。",
  search: "搜索", enrol: "登记", id: "编号", name: "姓名", picture: "图片", webcam: "使用摄像头", take: "拍照", chosen: "将要发送的图片", noWebcam: "无法使用摄像头：浏览器没有摄像头或未获授权。", mustLive: "要求本人在场（活体检测）", working: "请稍候…", gallery: "人员库", nobodyFound: "没有人员。", export: "导出", exportHint: "该密钥可查看的此人全部数据（ZIP）", enrolled: "已登记：质量 {0}。",
  faces: "{0} 张人脸", quality: "质量", delete: "删除", deleteAll: "删除 {0} 及其全部数据？", receipt: "删除凭证", close: "关闭", deleted: "已删除：{0} 个模板。", copy: "保存凭证",
  health: "健康状态", pools: "模型池", worker: "工作进程", state: "状态", device: "设备", memory: "内存", budget: "{0} / {1} MiB", restarts: "重启次数", loss: "最近故障", cameras: "摄像机", rate: "每秒结果", age: "延迟 (p95)", drops: "丢弃", tracks: "轨迹", queued: "排队", models: "模型", load: "负载", loadHint: "100 % 表示可按时处理的上限", encoding: "编码", watchers: "观看者", failed: "失败", shards: "分片", shard: "分片编号", draining: "服务器正在关闭，不再接受新的摄像机。", amiss: "异常",
  NO_FACE: "未找到人脸。请使用一张正面、竖直的人脸图片。", MULTIPLE_FACES: "图片中有多张人脸。请裁剪到目标人脸。",
  OOD_REJECTED: "人脸不够清晰。请拍摄更清晰、更明亮的正面照片。", SPOOF_SUSPECTED: "图片似乎是打印件或屏幕。",
  NO_CONTEXT: "人脸周围显示得太少。", LIVENESS_UNDECIDED: "无法确认本人在场。请重新拍摄。",
  FACE_OF_ANOTHER: "该人脸与另一已登记人员匹配。如有误，请先选择“不是 …”。", UNAUTHENTICATED: "服务器不认识此密钥。", PERMISSION_DENIED: "此密钥无权执行该操作。",
  ended: "会话已结束，请重新登录。", nobodyCalled: "没有编号为 {0} 的人员。", enrolNew: "将 {0} 登记为新人员", addFace: "添加图片", deleteFace: "删除 {1} 于 {0} 登记的人脸？", saidNot: "“不是 …”", saidIs: "“这是 …”", peopleOf: "显示前 {0} 人，其余请搜索。", morePeople: "显示更多",
  NO_CONSOLE: "控制台没有响应；恢复运行后将重试。", UNREACHABLE: "无法连接服务器。", DEADLINE_EXCEEDED: "服务器未及时响应。", POOL_UNAVAILABLE: "所需模型目前未运行。", GALLERY_UNAVAILABLE: "人员库目前不可用。", DRAINING: "服务器正在关闭。", QUOTA_EXCEEDED: "此密钥请求过多，请稍等一分钟。", GALLERY_FULL: "人员库已满。", CAPACITY: "服务器目前没有余量。", FULL: "登录人数过多。",
  PICTURE_TOO_LARGE: "图片过大。", PICTURE_TOO_SMALL: "图片过小。", PICTURE_EMPTY: "图片为空。", PICTURE_TOO_COSTLY: "图片读取耗时过长，请另存为普通 JPEG。", ENCODING_UNSUPPORTED: "不支持此类图片，请使用 JPEG、PNG 或 WebP。", ENCODING_MISMATCH: "不支持此类图片，请使用 JPEG、PNG 或 WebP。", SUBJECT_NOT_FOUND: "该人员已不存在。", TEMPLATE_NOT_FOUND: "该项已不存在。", EVENT_NOT_FOUND: "该事件已不再保存。", CSRF: "页面属于另一会话，请重新加载。", NO_SESSION: "请先登录。",
  TOO_MANY_TRIES: "尝试次数过多，请稍等一分钟。", PICTURE_CORRUPT: "无法读取图片。", PICTURE_NOT_FOUND: "图片已不再保存。", LOW_OOD_SCORE: "更清晰的图片效果更好。", LOW_QUALITY: "此人已有更好的图片。",
};
/** Kinds of events, in both languages. */
export const KINDS = {
  SUBJECT_SEEN: ["Seen", "识别到人员"], UNKNOWN_SEEN: ["Unknown", "陌生人"], SPOOF_SUSPECTED: ["Spoof?", "疑似伪造"], FACE_HIDDEN: ["Face hidden", "人脸被遮挡"],
  SUBJECT_CANDIDATE: ["To be confirmed", "待确认"], ZONE_ENTERED: ["Zone entered", "进入区域"], ZONE_LEFT: ["Zone left", "离开区域"], ZONE_DWELL: ["Stays in zone", "区域停留"],
  ZONE_UNKNOWN: ["Unknown in zone", "区域内陌生人"], LINE_CROSSED: ["Line crossed", "越线"], TRACK_STARTED: ["Face came", "人脸出现"], TRACK_UPDATED: ["Face changed", "人脸更新"],
  TRACK_ENDED: ["Face left", "人脸离开"], STREAM_OPENED: ["Camera on", "摄像机接入"], STREAM_CLOSED: ["Camera off", "摄像机断开"], POOL_CHANGED: ["Pool", "模型池"], DEVICE_MEMORY: ["Device memory", "设备内存"],
} as const;
export type Kind = keyof typeof KINDS;
/** States of what serves: in English as the server and its documentation call them. */
const STATES: Record<string, string> = {
  SERVING: "正常", NOT_SERVING: "不可用", DEGRADED: "降级", STARTING: "启动中", DRAINING: "正在停止", SPAWNED: "已启动", LOADING: "加载中", WARMING: "预热中",
  READY: "就绪", EXITED: "已退出", LOST: "已丢失", BACKOFF: "等待重启", QUARANTINED: "已隔离", UNKNOWN: "未知", SERVICE_UNKNOWN: "未知",
};
export const state = (name: string): string => (chosen === "zh" ? STATES[name] ?? name : name);
export const kind = (name: string): string => KINDS[name as Kind]?.[chosen === "zh" ? 1 : 0] ?? name;
export const languages = { en, zh };
export type Language = keyof typeof languages;
let chosen: Language = (localStorage.getItem("language") as Language | null) ?? (navigator.language.startsWith("zh") ? "zh" : "en");
export const language = () => chosen;
export function speak(next: Language) {
  chosen = next;
  localStorage.setItem("language", next);
  document.documentElement.lang = next === "zh" ? "zh-CN" : "en";
}
speak(chosen);
export function t(word: Word, ...values: unknown[]): string {
  // In one go: what people are called may look like a placeholder, or like a pattern of `replace`.
  return languages[chosen][word].replace(/\{(\d)\}/g, (all, n: string) => (+n < values.length ? String(values[+n]) : all));
}
/** The words for a refusal, or the server's own. */
export const reason = (why: Refusal) => (why.reason in en ? t(why.reason as Word) : why.message);
export type Refusal = { reason: string; message: string };
